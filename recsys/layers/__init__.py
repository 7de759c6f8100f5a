"""Building blocks of the models, all on jagged `(tokens, width)` values."""
