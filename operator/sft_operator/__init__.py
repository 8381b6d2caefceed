"""The operator: from SFTJobs in a cluster to gangs of pods, and their state back into status."""
