"""What a device gives: values, fits, steps, speed and memory."""
