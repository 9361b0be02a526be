"""Values and code as bytes: codecs, pickles, and the seals that say who made them."""
