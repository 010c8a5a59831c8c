"""Many runs under equal conditions: plan, execute, rank, write, measure."""
