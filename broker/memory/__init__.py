"""Queue and store in memory, for the embedded form: the same promises as far as one process can keep them."""
