"""Building a token cache: a corpus becomes tokens on all cores, and a killed attempt is gone on with."""
