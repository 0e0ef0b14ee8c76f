package crayon.app

import android.content.ContentProvider
import android.content.ContentValues
import android.database.Cursor
import android.database.MatrixCursor
import android.net.Uri
import android.os.ParcelFileDescriptor
import android.provider.OpenableColumns
import org.robolectric.Robolectric
import java.io.FileNotFoundException
import java.nio.file.Path
import kotlin.io.path.exists
import kotlin.io.path.fileSize

/** Gives files as a document provider does. */
class Documents : ContentProvider() {
    override fun onCreate() = true

    override fun query(uri: Uri, projection: Array<String>?, selection: String?, arguments: Array<String>?, order: String?): Cursor =
        MatrixCursor(arrayOf(OpenableColumns.SIZE)).apply { addRow(arrayOf(file(uri).takeIf { it.exists() }?.fileSize())) }

    override fun openFile(uri: Uri, mode: String): ParcelFileDescriptor {
        if (!file(uri).exists()) throw FileNotFoundException("it was deleted")
        return ParcelFileDescriptor.open(file(uri).toFile(), ParcelFileDescriptor.MODE_READ_ONLY)
    }

    override fun getType(uri: Uri) = "application/octet-stream"

    override fun insert(uri: Uri, values: ContentValues?) = null

    override fun delete(uri: Uri, selection: String?, arguments: Array<String>?) = 0

    override fun update(uri: Uri, values: ContentValues?, selection: String?, arguments: Array<String>?) = 0

    private fun file(uri: Uri): Path = Path.of(checkNotNull(uri.path))

    companion object {
        /** The address of a file, as a picker would return it. */
        fun of(path: Path): Uri {
            Robolectric.buildContentProvider(Documents::class.java).create("crayon.documents")
            return Uri.parse("content://crayon.documents$path")
        }
    }
}
