"""Run public scripts that import `ldm` on this package and on their own repository's, and compare what they write."""
