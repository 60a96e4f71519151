"""What any implementation of Llama must compute: the suite proper, its strategies and its judge."""
