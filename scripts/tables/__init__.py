"""The tables that `docs_tables.py` puts into the documents."""
