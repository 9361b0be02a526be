"""What users import: the client, handles, futures, and the module-level functions on the current client."""
