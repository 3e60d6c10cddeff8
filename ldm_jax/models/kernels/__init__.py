"""What takes the place of plain operations on a platform."""
