"""Coming into a run under way: from the address of a member, or as a process of the run that is started again."""
