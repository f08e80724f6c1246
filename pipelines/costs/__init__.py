"""What a command will take: tasks, hours, gigabytes and dollars, from measured rates."""
