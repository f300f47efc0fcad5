"""What was spent and what was taken back, embedded or shared by several brokers."""
