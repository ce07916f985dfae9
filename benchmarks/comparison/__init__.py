"""What `compare.py` is made of: cases and contenders, runs, records, tables and plots."""
