"""Openings of user turns from which the target writes the rest of its own training prompts.

The target continues each opening by sampling (in the manner of Magpie, arXiv 2406.08464), so an opening only steers the
category; the empty opening lets the model choose. None of these is an evaluation prompt.
"""

# fmt: off
SEEDS: dict[str, list[str]] = {
    "chat": [
        "", "", "", "", "", "", "How do I", "How can I", "What is the best way to", "Can you explain", "Why do",
        "Why is", "I am planning", "I want to learn", "Tell me about", "What are some", "Give me",
        "Could you help me", "Suggest", "Describe", "I'm feeling", "My friend", "What would happen if",
        "Write a short", "Write an email", "Compare", "Please recommend", "What should I", "Is it safe to",
        "Explain the difference between", "Hi, I'm", "Create a", "List three", "Who was", "When did", "What does",
        "How does", "In your opinion,", "I need advice on", "Help me", "Write a poem about", "Write a story about",
        "Imagine you are", "Give a brief overview of", "Name five",
    ],
    "code": [
        "Write a Python function", "Write a Python function that takes a list", "Write a function to",
        "Write a Python program to", "Implement", "Implement a class", "How do I in Python",
        "Fix the bug in this code:\n\n", "def ", "Complete the following function:\n\ndef ", "Write a SQL query",
        "Write a JavaScript function", "Explain what this code does:\n\n", "Write a regular expression",
        "Write a Python class", "Create a function", "Write code that", "Given a string,",
        "Given a list of integers,", "Write a script", "Write a unit test for", "Write a recursive function",
        "Convert this code to Python:\n\n", "What is the output of this code?\n\n", "Write a C++ program",
        "Write a Java method", "Write a bash command", "Python: read a file and", "Write a function called",
        "Write a Python one-liner", "from typing import List\n\n\ndef ", "Refactor this function:\n\n",
        "Write a generator", "Write a program that prints", "How would you sort",
    ],
    "math": [
        "What is", "Solve for x:", "Solve the equation", "Calculate", "Find the", "A train", "A farmer has",
        "Maria has", "Tom buys", "If a", "If x =", "How many", "A store sells", "A rectangle has", "The sum of",
        "What is the area of", "Sarah earns", "There are", "A box contains", "Compute the", "Simplify",
        "What percentage of", "The price of", "John has", "A car travels", "Each", "In a class of", "A recipe",
        "Factor the", "Convert", "Two numbers", "What is the probability", "The average of", "A baker", "Emily read",
        "At a school,", "Every day,", "Evaluate", "A shop", "Find the value of", "Prove that",
        "What is the derivative of", "Lisa is", "A tank",
    ],
    "summarization": [
        "Summarize the following text:\n\n", "Summarize the following passage in one sentence:\n\n",
        "Summarize this article:\n\n", "Give a short summary of the following paragraph.\n\n",
        "What is the main idea of this text?\n\n", "Please summarize:\n\n", "TL;DR of the following:\n\n",
        "Write a one-sentence summary.\n\nText: ", "Summarize the news story below.\n\n",
        "Condense this paragraph:\n\n", "Read the text and list the key points.\n\n",
        "Summarize the following email:\n\n", "Summarize the following conversation:\n\n",
        "Provide a brief summary of this report:\n\n", "Summarize the following text:\n\nThe",
        "Summarize the following text:\n\nIn", "Summarize this:\n\nA",
        "Summarize the following passage:\n\nScientists", "Summarize the following passage:\n\nResearchers",
        "Summarize the following story:\n\nOnce", "Shorten this text:\n\n", "Summarize the abstract below.\n\n",
        "Summarize in your own words:\n\n", "Summarize the following passage:\n\nThe city",
    ],
}
