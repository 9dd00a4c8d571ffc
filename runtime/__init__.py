"""What every command stands on: checked files and paths, the device, saving and resuming a run."""
