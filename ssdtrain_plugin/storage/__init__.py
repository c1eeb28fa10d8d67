"""Where bytes go: host memory and drives. Knows bytes only."""
