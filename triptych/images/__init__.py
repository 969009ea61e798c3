"""Pictures: files, foreground, prepared view sets, view sheets. Import from the modules."""
