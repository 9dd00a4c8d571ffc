"""What every command uses: checked files and paths, the device, saving and resuming a run."""
