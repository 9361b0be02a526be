"""The part that users import: the client, handles, futures, and the module-level functions, which use the current client."""
