"""The report of runs: what their folders say, as a page with figures, a table and a verdict."""
