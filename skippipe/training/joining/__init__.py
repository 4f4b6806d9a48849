"""Coming into a run: from the address of a member, before its start or later, or as a process that is started again."""
