"""The exercise's figures computed a second time from its raw ones, apart from the package: used by
`scripts/check_comparison.py`."""
