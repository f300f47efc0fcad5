"""What was spent, embedded or shared by several brokers."""
