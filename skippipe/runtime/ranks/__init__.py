"""How ranks meet, agree, fail together and form process groups."""
