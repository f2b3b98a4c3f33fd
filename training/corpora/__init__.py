"""What policies are trained and tested on: repositories of source code, and how they are split."""
