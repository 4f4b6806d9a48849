"""What drafts tokens: fixed layers, or the layers and lookups that the text so far says are fastest."""
