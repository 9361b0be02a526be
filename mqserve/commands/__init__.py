"""What users type: the command line and its commands."""
