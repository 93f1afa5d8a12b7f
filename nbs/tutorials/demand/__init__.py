"What training and serving share: see the tutorial *Any Python model*"
