"""Training engines that methods call and never copy."""
