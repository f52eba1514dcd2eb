"""What each command does, from data on disk to results: the command line only parses and prints."""
