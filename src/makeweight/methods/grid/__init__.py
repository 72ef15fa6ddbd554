"""How a matrix meets its grid."""
