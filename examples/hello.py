import mqserve as serve


@serve.endpoint("/hello/{name}")
def hello(request):
    return f"Hello, {request.path_params['name']}!"
