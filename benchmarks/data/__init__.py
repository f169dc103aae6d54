"""What counting in a corpus costs."""
