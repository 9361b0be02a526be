"""The queue and the store in memory, for the embedded form. They keep the same promises as far as one process can."""
