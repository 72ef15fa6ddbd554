"""What is learned once every block is on its grid."""
