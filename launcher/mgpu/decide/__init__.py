"""Pure: model, rig, request and what a runtime needs, to a plan and its reasons."""
