"""Device functions of a softmax that is taken a stretch at a time: states and how they merge."""
