"""Side-by-side measurements with peers, each in one run: see ``README.md`` in this folder."""
