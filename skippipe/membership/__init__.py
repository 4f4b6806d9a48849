"""Who is in the run: detection of loss, and agreement of those who live on who goes on. No torch."""
