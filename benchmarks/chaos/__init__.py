"""A run that is interrupted at random instants by random faults, and what of it survives."""
