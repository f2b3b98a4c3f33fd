"""What a session is and where its state lives."""
