"""One matrix to one matrix, before it meets its grid."""
