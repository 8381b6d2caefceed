"""What `benchmarks` measures us against, each in a process of its own."""
