"""HTTP in, envelope out; future in, HTTP out."""
