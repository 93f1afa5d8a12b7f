import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpResponse.BodyHandlers;
import java.time.Duration;
import java.util.concurrent.CompletableFuture;

/** The JDK's own client as its documentation shows it: HTTP/2 unless told otherwise, so each first request asks for an upgrade to h2c. */
class Predict {
    public static void main(String[] args) throws Exception {
        for (var client : new HttpClient[] {HttpClient.newHttpClient(), HttpClient.newBuilder().version(HttpClient.Version.HTTP_1_1).build()}) {
            for (int row = 0; row < 3; row++) {
                String body = "{\"inputs\": [{\"name\": \"x\", \"datatype\": \"FP32\", \"shape\": [1, 2], \"data\": [" + row + ", 2]}]}";
                show(client, HttpRequest.newBuilder().header("Content-Type", "application/json").POST(HttpRequest.BodyPublishers.ofString(body)), args[0] + "/infer");
            }
            String large = "{\"inputs\": [{\"name\": \"x\", \"datatype\": \"FP32\", \"shape\": [20000, 2], \"data\": [" + "1.5,".repeat(39999) + "1.5]}]}";
            show(client, HttpRequest.newBuilder().header("Content-Type", "application/json").POST(HttpRequest.BodyPublishers.ofString(large)), args[0] + "/infer");
            show(client, HttpRequest.newBuilder().GET(), args[0]);
            show(client, HttpRequest.newBuilder().method("HEAD", HttpRequest.BodyPublishers.noBody()), args[0]);
            var several = new CompletableFuture<?>[8];
            for (int i = 0; i < several.length; i++)
                several[i] = client.sendAsync(HttpRequest.newBuilder(URI.create(args[0] + "/ready")).build(), BodyHandlers.ofString()).thenAccept(r -> {
                    if (r.statusCode() != 200) throw new IllegalStateException(r.body());
                });
            CompletableFuture.allOf(several).join();
        }
    }

    static void show(HttpClient client, HttpRequest.Builder request, String url) throws Exception {
        var answer = client.send(request.uri(URI.create(url)).timeout(Duration.ofSeconds(20)).build(), BodyHandlers.ofString());
        String text = answer.body();
        System.out.println(answer.version() + " " + answer.statusCode() + " " + (text.length() < 300 ? text : text.length() + " characters"));
    }
}
