"""What an export's directory holds, and how it is read: files, manifest, preprocessing."""
