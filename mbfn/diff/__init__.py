"""What differs between two runs, after everything is resolved, and what it changes: `python -m mbfn.diff A B`."""
