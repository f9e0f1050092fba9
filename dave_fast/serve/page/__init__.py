"""The page at /: one HTML file, one of style, one of script; no other origin is asked for anything."""
