"""The directory that deploys: made, described, and verified."""
