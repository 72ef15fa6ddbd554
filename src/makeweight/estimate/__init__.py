"""What a run will take: operations, bytes in memory and bytes on disk, from shapes alone."""
