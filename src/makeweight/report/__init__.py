"""What a run shows and keeps: records, tables, progress."""
