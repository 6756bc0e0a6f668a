"""What Twilight did, counted on the device and read off the decode path."""
